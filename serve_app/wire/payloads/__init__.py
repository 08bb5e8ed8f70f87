"""What is known of a payload, and the parts that formats are made of."""
