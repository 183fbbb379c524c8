"""The torch models that analysis and export share."""
