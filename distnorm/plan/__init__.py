"""Who holds what of the model, and every collective that the library issues."""
