"""Training of UNIT: recipe -> arguments -> data -> collator -> trainer."""
