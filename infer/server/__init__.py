"""`infer serve`: model files behind an OpenAI-compatible HTTP API, batched character by character.

    client -- HTTP --> app, completions (one process, an event loop)
                         |  pool: JSON lines over pipes, one process per worker
                         v
                       worker -> scheduler -> Engine     B rows a tick; rows join and leave between ticks

The engine runs in processes of its own: a crash of one becomes a 500, and Python's lock is not shared with HTTP.
"""
