"""The KV cache: what each head keeps of the frames before, decided in one place.

In reading order: `roles` (what a cached token is), `policies` (which roles each group of heads sees, as
TOML), `plan` (a policy applied to a model: every shape, phase and byte), `buffers` (a session's memory for
it), `rebuild` (what is computed anew when the prompt is switched), and `window` (where frames lie in time).
The torch half is `models/kv.py` and `models/kv_roles.py`.
"""
