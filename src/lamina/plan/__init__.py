"""What a deployment will deliver before it is bought: costs, simulation, search. Pure: no torch."""
