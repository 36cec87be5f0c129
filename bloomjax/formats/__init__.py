"""Layouts and tensor names of the formats that BLOOM is published in."""
