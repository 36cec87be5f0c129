"""Conversions between the formats of BLOOM: a job, with a command line."""
