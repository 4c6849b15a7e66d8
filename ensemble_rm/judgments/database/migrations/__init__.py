"""Migrations of the store's schema, one file each; Alembic runs them when a store is opened."""
