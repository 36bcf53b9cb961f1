package aegis

import (
	"strings"
	"sync"
	"sync/atomic"
)

// This file has the rules for names, and for subjects and their patterns, and the lookup, a bounded map by names that come from
// outside.

// checkNames returns an error if a service, or its method or command, has an invalid name.
func checkNames(service, what, name string) *Error {
	switch {
	case !isName(service, maxService):
		return notRun(newError(ErrInvalid, "service %q: want a letter, then letters, digits, - and _, at most %d", service, maxService))
	case !isName(name, 128), strings.Contains(name, "-"):
		return notRun(newError(ErrInvalid, "%s %q: want a letter, then letters, digits and _", what, name))
	}
	return nil
}

// isName reports whether s is a token that begins with a letter.
func isName(s string, most int) bool {
	return isToken(s, most) && (s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z')
}

// isToken reports whether s is one token of a subject, of 1 to most letters, digits, - and _.
func isToken(s string, most int) bool {
	return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_'
	})
}

// covers reports whether all subjects that match the pattern sub also match pattern.
func covers(pattern, sub string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(sub, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s), s[i] == ">", token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

// A lookup is a map that makes a value when its key is first asked for. Reading takes no lock.
type lookup[T any] struct {
	most   int // how many keys it may have, 0 for no limit; all keys beyond the limit share the value of othersKey
	values sync.Map
	mu     sync.Mutex   // guards adding, so that make is called once for each key
	count  atomic.Int64 // how many keys there are
}

const othersKey = "OTHERS"

// get returns the value of key. If there is none, it adds the one that make returns, which it calls at most once for a key.
func (l *lookup[T]) get(key string, make func() T) T {
	find := func() (v any, ok bool) {
		if v, ok = l.values.Load(key); !ok && l.most > 0 && int(l.count.Load()) >= l.most {
			key = othersKey
			v, ok = l.values.Load(key)
		}
		return v, ok
	}
	if v, ok := find(); ok {
		return v.(T)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if v, ok := find(); ok {
		return v.(T)
	}
	v := make()
	l.values.Store(strings.Clone(key), v) // key may be a part of a large string
	l.count.Add(1)
	return v
}

// all returns a copy of the map.
func (l *lookup[T]) all() map[string]T {
	all := map[string]T{}
	for key, v := range l.values.Range {
		all[key.(string)] = v.(T)
	}
	return all
}
