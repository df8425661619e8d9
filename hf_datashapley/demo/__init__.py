"""The demo's parts: text that every Python installation holds, rows of tokens, small models, and what is measured."""
