"""Operations of the Gemma-2 text encoder between its matrix products."""
