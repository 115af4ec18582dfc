"""Tests of the service with a real OpenClaw gateway. Only the model behind the gateway is a stand-in."""
