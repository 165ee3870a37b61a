"""Operations around the transformer's blocks: layout of latents, modulation rows, camera geometry, rotary tables, the Euler step."""
