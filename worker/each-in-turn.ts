/** Does a step for each, one after the other, also when some fail; then throws what failed first. */
export async function eachInTurn<T>(
  items: readonly T[],
  step: (item: T, index: number) => Promise<void>,
): Promise<void> {
  const failures: unknown[] = [];
  for (const [index, item] of items.entries()) await step(item, index).catch((error) => failures.push(error));
  if (failures.length > 0) throw failures[0];
}
