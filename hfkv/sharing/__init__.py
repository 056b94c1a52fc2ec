"""Tokens that several calls share."""
