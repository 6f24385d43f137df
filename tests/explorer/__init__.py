"""Tests of the explorer: its answers, its server, and its page in a real browser."""
