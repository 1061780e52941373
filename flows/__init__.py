"""The Prefect flows: order, schedule, retries."""
