"""Reading run folders and reporting on them."""
