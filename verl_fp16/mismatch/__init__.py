"""How far training and inference disagree. Pure torch; no import of verl."""
