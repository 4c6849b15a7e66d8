"""The migrations, in the order of their numbers; a released migration is never changed."""
