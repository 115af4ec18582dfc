"""The service against the real OpenClaw gateway: nothing is replaced but the model behind it."""
