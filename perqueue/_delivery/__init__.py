"""Delivery: claims what is due, sends it, and settles what became of it. It knows no SQL and no HTTP."""
