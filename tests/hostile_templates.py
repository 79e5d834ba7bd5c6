"""Chat templates that would run for hours or fill the memory, by what they do it with."""

HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
             "{% endfor %}",
    "loops with ifs": "{% for i in range(99999) %}{% for j in range(99999) %}{% if i == j %}{% endif %}{% endfor %}"
                      "{% endfor %}",
    "loops that filter": "{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}",
    "loops in a set": "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
                      "{% endset %}",
    "recursive loop": "{% for a in [[1, 2]] * 3 recursive %}{{ loop([[1, 2]] * 3) if loop.depth < 40 }}{% endfor %}",
    "macro twice": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "call blocks": "{% macro a(n) %}{{ caller() }}{% if n %}{% call a(n - 1) %}{% endcall %}{% call a(n - 1) %}"
                   "{% endcall %}{% endif %}{% endmacro %}{% call a(60) %}{% endcall %}",
    "blocks": "{% block a %}{% for i in range(9999) %}{{ self.b() }}{% endfor %}{% endblock %}"
              "{% block b %}{% for i in range(9999) %}{{ 1 }}{% endfor %}{% endblock %}",
    "maps": "{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
    "selects": "{% for i in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "select without a test": "{% for i in range(99999) %}{{ range(99999) | select | list | length }}{% endfor %}",
    "sums": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "sorts": "{% for i in range(99999) %}{{ range(99999) | sort | first }}{% endfor %}",
    "sum of lists": "{{ ([[1] * 100] * 5000) | sum(start=[]) | length }}",
    "times": "{{ 'a' * 3000000000 }}", "times, reversed": "{{ 3000000000 * 'a' }}",
    "list times": "{{ [0] * 400000000 }}", "tuple times": "{{ (0, 1) * 400000000 }}",
    "wide times": "{{ '\U0001f389' * 60000000 }}",
    "doubling": "{% set n = namespace(a='x' * 1000) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "doubling by concat": "{% set n = namespace(a='x' * 1000) %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}"
                          "{% endfor %}",
    "doubling by replace": "{% set n = namespace(a='xx') %}{% for i in range(99) %}"
                           "{% set n.a = n.a | replace('x', 'xx') %}{% endfor %}",
    "doubling by method": "{% set n = namespace(a='xx') %}{% for i in range(99) %}"
                          "{% set n.a = n.a.replace('x', 'xx') %}{% endfor %}",
    "doubling by format": "{% set n = namespace(a='xx') %}{% for i in range(99) %}"
                          "{% set n.a = '{0}{0}'.format(n.a) %}{% endfor %}",
    "doubling by percent": "{% set n = namespace(a='xx') %}{% for i in range(99) %}"
                           "{% set n.a = '%s%s' % (n.a, n.a) %}{% endfor %}",
    "doubling by block": "{% set n = namespace(a='xx') %}{% for i in range(99) %}{% set b %}{{ n.a }}{{ n.a }}"
                         "{% endset %}{% set n.a = b %}{% endfor %}",
    "doubling lists": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "nested lists": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
                    "{{ n.a }}",
    "nested tuples": "{% set n = namespace(a=(1,)) %}{% for i in range(99) %}{% set n.a = (n.a, n.a) %}{% endfor %}"
                     "{{ {n.a: 1} }}",
    "nested dicts": "{% set n = namespace(a={}) %}{% for i in range(99) %}{% set n.a = {1: n.a, 2: n.a} %}{% endfor %}"
                    "{{ n.a | tojson }}",
    "nested by dict()": "{% set n = namespace(a={}) %}{% for i in range(99) %}{% set n.a = dict(a=n.a, b=n.a) %}"
                        "{% endfor %}{{ n.a | pprint }}",
    "nested by batch": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% for b in [n.a, n.a] | batch(2) %}"
                       "{% set n.a = b %}{% endfor %}{% endfor %}{{ n.a == n.a + [] }}",
    "namespaces": "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n = namespace(a=n, b=n) %}{{ n }}"
                  "{% endfor %}{% set ns = namespace(x=1) %}{% for i in range(60) %}"
                  "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}{{ 'a' * 3000000000 }}",
    "power": "{{ 10 ** 10000000 }}", "power of power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(a=3) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "hex": "{{ 0x" + "f" * 200_000 + " * 0x" + "f" * 2000 + " }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "percent width": "{{ '%2000000000d' % 1 }}", "percent precision": "{{ '%.2000000000f' % 1.0 }}",
    "percent star": "{{ '%*d' % (2000000000, 1) }}", "percent name": "{{ '%((a)b)2000000000d' % {'(a)b': 1} }}",
    "percent name with percent": "{{ '%(a%b)2000000000d' % {'a%b': 1} }}",
    "percent names": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "format filter": "{{ '%2000000000d' | format(1) }}",
    "format filter names": "{{ ('%(a)s' * 99999) | format(a='x' * 99999) }}",
    "format": "{{ '{:2000000000}'.format(1) }}", "format nested": "{{ '{:{w}}'.format(1, w=2000000000) }}",
    "format precision": "{{ '{:.2000000000f}'.format(1.0) }}",
    "format_map": "{{ '{a:2000000000}'.format_map({'a': 1}) }}",
    "format fields": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "format repr": "{{ ('{0!r}' * 9999).format('x' * 99999) }}",
    "format by attr": "{{ ('{:2000000000}' | attr('format'))(1) }}",
    "center": "{{ 'a' | center(2000000000) }}", "center method": "{{ 'a'.center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "rjust": "{{ 'a'.rjust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(20000000) }}",
    "expandtabs keyword": "{{ '\t'.expandtabs(tabsize=2000000000) }}",
    "encode": "{{ ('\u00fc' * 20000000).encode('punycode') }}",
    "translate": "{{ ('a' * 999999).translate({97: 'x' * 99999}) }}",
    "to_bytes": "{{ (5).to_bytes(2000000000, 'little') }}",
    "fromkeys": "{{ dict.fromkeys(range(99999), 'x' * 99999) }}",
    "split": "{{ ('a ' * 15000000).split() | length }}", "split by": "{{ ('ab,' * 10000000).split(',') | length }}",
    "splitlines": "{{ ('ab\n' * 10000000).splitlines() | length }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}", "indent text": "{{ ('a\n' * 100000) | indent('x' * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'x' * 100000) }}",
    "replace nothing": "{{ ('a' * 99999).replace('', 'x' * 99999) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "join big": "{{ ([0] * 99999) | map('string') | join('x' * 9999999) }}",
    "join method": "{{ ('x' * 99999).join('y' * 99999) }}",
    "join attribute": "{{ ([{'a': 'x' * 99999}] * 99999) | join(attribute='a') }}",
    "slice": "{{ range(10) | slice(100000000) | list }}", "slice length": "{{ range(10) | slice(100000000) | length }}",
    "batch": "{{ range(10) | batch(1000000000, 'x') | list }}",
    "wordwrap": "{{ ('a ' * 20000) | wordwrap(1, wrapstring='x' * 99999) }}",
    "tojson indent": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "tojson deep":
        "{{ ([1] * 99999) | tojson(64) }}{% for i in range(99999) %}{{ ([1] * 99999) | tojson(64) }}{% endfor %}",
    "list of text": "{{ ('\u65e5' * 15000000) | list | length }}",
    "sort of text": "{{ ('\u65e5' * 15000000) | sort | length }}",
    "comparisons": "{% set a, b = 'x' * 20000000, 'x' * 19999999 + 'x' %}{% for i in range(99999) %}" +
                   "{{ a == b }}" * 200 + "{% endfor %}",
    "chained comparison":
        "{% set a, b = 'x' * 20000000, 'x' * 19999999 + 'x' %}{{ " + " == ".join(["a", "b"] * 4000) + " }}",
    "sort of long texts": "{{ (['x' * 9000000, 'x' * 8999999 + 'x'] * 9999) | sort | length }}",
    "sort by attribute": "{% set a, b = namespace(x='x' * 9000000), namespace(x='x' * 8999999 + 'x') %}"
                         "{{ ([a, b] * 9999) | sort(attribute='x') | length }}",
    "slices": "{% set a = 'x' * 20000000 %}" + "".join(f"{{% set a{i} = a[1:] %}}" for i in range(999)),
    "copies": "{% set a = {'a': 1} %}{% for i in range(99999) %}{% set a = dict(a, **{'b': 'x' * 99999 ~ i}) %}"
              "{% endfor %}{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
              "{% set n.l = n.l + [range(999) | list] %}{% endfor %}",
    "title": "{{ ('a ' * 9000000) | title | length }}", "wordcount": "{{ ('a ' * 9000000) | wordcount }}",
    "urlize": "{{ ('www.a' * 999999) | urlize }}", "striptags": "{{ ('<!--' * 9999999) | striptags }}",
    "striptags method": "{{ (('<!-- -->' * 999999) | safe).striptags() }}", "lipsum": "{{ lipsum(n=1000000000) }}",
    "escape": "{% for i in range(99999) %}{{ ('\"' * 30000000) | escape | length }}{% endfor %}",
    "strftime": "{{ strftime_now('%1000000000Y') }}", "strftime long": "{{ strftime_now('%Y' * 999999) }}",
    "strftime bytes": "{{ strftime_now('%c' * 400 + '%_000000999d') }}",
    "text": "x" * (1 << 18) + "y", "tokens": "{{ a }}" * 30000, "many sets": "{% set a = 1 %}" * 18000,
    "a long list": "{{ [" + "a," * 100_000 + "] }}", "deep": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "prompt of data": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "macro of data":
        "{% macro a() %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endmacro %}{{ a() }}",
    "autoescape": "{% autoescape true %}{{ '<' * 30000000 ~ '<' }}{% endautoescape %}",
    "filter block": "{% filter replace('a', 'x' * 99999) %}{{ 'a' * 99999 }}{% endfilter %}",
    "loop.length of text": "{% for a in '\u65e5' * 15000000 %}{{ loop.length }}{% break %}{% endfor %}",
    "unpacking": "{{ cycler(*('\u65e5' * 15000000)) }}",
    "random": "{% for i in range(99999) %}{{ range(99999) | list | random }}{% endfor %}",
    "unique": "{% for i in range(99999) %}{{ range(99999) | unique | list | length }}{% endfor %}",
    "groupby": "{% for i in range(99999) %}{{ range(999) | groupby('real') | length }}{% endfor %}",
    "reverse": "{% for i in range(99999) %}{{ range(99999) | map('abs') | reverse | list | length }}{% endfor %}",
    "search from the right": "{{ ('a' * 20000000).rfind('b' + 'a' * 10000000) }}",
    "partition": "{{ ('a' * 20000000).rpartition('b' + 'a' * 10000000) }}",
    "split from the right": "{{ ('a' * 20000000).rsplit('b' + 'a' * 10000000) }}",
    "strip": "{{ ('a' * 20000000).strip('b' * 10000000 + 'a') }}",
    "trim": "{{ ('a' * 20000000) | trim('b' * 10000000 + 'a') }}",
    "one hash": "{{ dict(range(0, 99999 * 2305843009213693951, 2305843009213693951) | groupby('real')) | length }}",
    "one hash in pairs": "{{ dict(range(0, 99999 * 2305843009213693951, 2305843009213693951) | batch(2) | list) }}",
    "one hash, unique": "{{ range(0, 99999 * 2305843009213693951, 2305843009213693951) | unique | list | length }}",
    "braces": "{{ ('{{' * 15000000).format() }}", "specification": "{{ ('{:' ~ '1 ' * 9000000 ~ '}').format(1) }}",
    "indent of lines": "{{ ('\n' * 30000000) | indent(0) | length }}",
    "sets": "{% set a = 'x' * 30000000 %}{% set b %}" + "{{ a }}" * 5000 + "{% endset %}",
    "xmlattr": "{{ {'a': 'x' * 9999999} | xmlattr }}",
}
