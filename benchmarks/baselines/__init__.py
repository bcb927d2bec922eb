"""What lopt-lite is compared with: the usual ways of tuning an adapter on 4-bit weights end to end."""
