"""The embedded demonstration: what `idrm train` runs when neither a model nor data is named."""
