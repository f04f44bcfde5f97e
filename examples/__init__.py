"""Programs that show what hetsched does."""
