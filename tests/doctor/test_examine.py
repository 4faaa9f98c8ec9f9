"""examine() on files, state dicts and live models, and the layers of live models in the normal form."""
