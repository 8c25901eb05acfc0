"""Several reward models of one task: how sure they are of a pair together, and one model that is their mean."""
