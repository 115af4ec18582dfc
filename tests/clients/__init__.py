"""Tests of the service with real client programs."""
