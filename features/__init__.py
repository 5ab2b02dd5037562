"""What a data set looks like before one trains on it: features that are cheap beside the training whose harm they may foretell."""
