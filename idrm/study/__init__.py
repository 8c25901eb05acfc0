"""A study by cross-validation: small reward models with and without the interaction loss, on pairs new to them."""
