"""Runs a plan on real devices."""
