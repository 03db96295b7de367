"""Mailboxes: one contract, several transports."""
