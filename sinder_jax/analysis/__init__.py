"""What tokens and weights say of singular defects: numbers, no drawing."""
