"""Families of exercises that a program can check: the small models are taught some and measured on others."""
