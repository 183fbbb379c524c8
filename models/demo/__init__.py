"""The model that ships with forcingkv: its data, training and judge."""
