"""Requests in, tokens out: schedule, run, accept."""
