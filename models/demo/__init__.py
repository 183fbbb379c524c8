"""The model that ships with forcingkv: its data and its judge. `studies/train_demo.py` trained it."""
