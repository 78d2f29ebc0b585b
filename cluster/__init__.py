"""Control plane: who runs where, what runs next."""
