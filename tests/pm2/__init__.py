"""The service under the real PM2."""
