"""Tests of `bench` and `soak`, the tools that measure and that soak the relay."""
