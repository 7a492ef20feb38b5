"""Run by Alembic for every command; `migrations.run` brings the connection and the branch."""

from alembic import context

configured = context.config.attributes
branch = configured["branch"]
context.configure(
    connection=configured["connection"],
    target_metadata=branch.metadata,
    version_table=branch.version_table,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
