"""dpojax beside its peers: the same pairs, model, batch and optimizer, in alternating runs."""
