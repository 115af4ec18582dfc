"""The service as real client programs meet it."""
