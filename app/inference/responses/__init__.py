"""`/v1/responses`: another wire for what chat completions do, over the same service.

Does not cover: rendering, sampling and reading an answer (`app.inference.service`).
"""
