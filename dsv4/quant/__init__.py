"""Numbers and bytes: the stored formats, the tensor that carries one, and the model's activation quantisers."""
