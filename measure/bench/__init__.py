"""How fast policies run here: interleaved in one process, beside the limit that arithmetic sets."""
