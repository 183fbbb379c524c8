"""The demo model where memory matters: digits that go away and come back. `studies/train_occluded.py`
trained it."""
