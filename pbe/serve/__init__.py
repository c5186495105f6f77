"""Edits for others: a queue before a model (`engine`), and on it the HTTP server (`api`); the page runs on it too."""
