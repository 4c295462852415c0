"""The build: from a recipe to a published artifact."""
