"""Prompts -> text."""
