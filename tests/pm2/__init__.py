"""Tests of the service under the real PM2."""
