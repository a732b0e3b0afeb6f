"""Turns saved runs into something to read; never measures."""
