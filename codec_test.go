package aegis_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"reflect"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"
)

// gobbledygook is a codec as a user might define it: JSON with every bit flipped.
type gobbledygook struct{}

func (gobbledygook) ContentType() string { return "application/gobbledygook" }

func (gobbledygook) Marshal(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	return flip(data), err
}

func (gobbledygook) Unmarshal(data []byte, v any) error { return json.Unmarshal(flip(data), v) }

func flip(data []byte) []byte {
	out := make([]byte, len(data))
	for i, b := range data {
		out[i] = ^b
	}
	return out
}

type everything struct {
	B     bool
	I     int64 `json:"i"`
	U     uint8
	F     float64
	S     string `json:"s,omitempty"`
	D     []byte
	L     []string
	M     map[string]int
	P     *everything `json:"p,omitempty"`
	T     time.Time
	Any   any
	Skip  string `json:"-"`
	inner int
}

func TestCodecs(t *testing.T) {
	t.Parallel()
	in := everything{B: true, I: -5, U: 200, F: 1.5, S: "ü", D: []byte{0, 255}, L: []string{"a", ""}, M: map[string]int{"x": 1},
		P: &everything{S: "deep"}, T: time.Unix(1e9, 5).UTC(), Any: "a", Skip: "skipped", inner: 3}
	want := in
	want.Skip, want.inner = "", 0
	for _, c := range []aegis.Codec{aegis.MsgPack, aegis.JSON} {
		data, err := c.Marshal(&in)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := c.Marshal(&in)
		if !bytes.Equal(data, again) {
			t.Errorf("%s: equal values have different encodings", c.ContentType())
		}
		var out everything
		if err := c.Unmarshal(data, &out); err != nil {
			t.Fatal(err)
		}
		out.T, out.P.T = out.T.UTC(), out.P.T.UTC()
		want := want
		want.P = out.P
		if out.P.S != "deep" || !reflect.DeepEqual(out, want) {
			t.Errorf("%s: got %+v, want %+v", c.ContentType(), out, want)
		}
		var raw map[string]any
		if err := c.Unmarshal(data, &raw); err != nil || raw["s"] != "ü" || raw["Skip"] != nil {
			t.Errorf("%s: got %v, %v", c.ContentType(), raw, err)
		}
	}
}

func TestMsgPackRejectsMalformedInput(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{
		"empty input":           {},
		"the unused code 0xc1":  {0xc1},
		"two values":            {1, 2},
		"half a float":          {0xcb, 1, 2, 3},
		"half a string":         {0xd9, 5, 'a'},
		"half a length":         {0xdb, 0, 0},
		"an array of 4 billion": {0xdd, 0xff, 0xff, 0xff, 0xff},
		"a map of 4 billion":    {0xdf, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"bytes of 4 GB":         {0xc6, 0xff, 0xff, 0xff, 0xff, 1},
		"an extension of 4 GB":  {0xc9, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"a million levels":      append(bytes.Repeat([]byte{0x91}, 1_000_000), 1),
		"a timestamp of 1e9 ns": {0xd7, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		"an unknown extension":  {0xd4, 5, 5},
		"129 levels":            append(bytes.Repeat([]byte{0x91}, 129), 1),
		"a map without a value": {0x82, 1, 1, 2},
		"an unhashable key":     {0x81, 0x91, 1, 1},
	} {
		var m map[any]any
		if err := aegis.MsgPack.Unmarshal(data, &m); err == nil {
			t.Errorf("%s: no error", name)
		}
		var v any
		if err := aegis.MsgPack.Unmarshal(data, &v); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	var v any
	if err := aegis.MsgPack.Unmarshal(append(bytes.Repeat([]byte{0x91}, 128), 1), &v); err != nil {
		t.Error(err)
	}
}

// Types that encoding/json and msgpack v5 treat differently.
type (
	decimal  struct{ units int64 } // like shopspring's: JSON, text and binary, and IsZero
	isolated struct{ set bool }    // unexported fields and IsZero: {} in JSON
	base     struct {
		ID   string `json:"id"`
		Note string `json:"note"`
	}
	Anonymous struct{ Inner string }
	tree      struct {
		Name   string  `json:"name"`
		Parent *tree   `json:"parent,omitempty"`
		Kids   []*tree `json:"kids,omitempty"`
	}
	byteLike byte
	textKey  struct{ name string }
	tagged2  struct { // is decoded by encoding/json
		A time.Time
		B int `json:",omitzero"`
	}
	outer struct {
		X    int
		Next *extended
		Y    int
	}
	extended struct { // contains a type that is not finished when its own shape is made
		outer
		Z int
	}
	endpoint struct {
		*url.URL
		Weight int
	}
	namedURL struct {
		url.URL
		Weight int
	}
)

func (d decimal) MarshalJSON() ([]byte, error)  { return strconv.AppendQuote(nil, d.String()), nil }
func (d *decimal) UnmarshalJSON(b []byte) error { return d.UnmarshalText(bytes.Trim(b, `"`)) }
func (d decimal) MarshalText() ([]byte, error)  { return []byte(d.String()), nil }
func (d *decimal) UnmarshalText(b []byte) (err error) {
	d.units, err = strconv.ParseInt(string(b), 10, 64)
	return err
}
func (d decimal) MarshalBinary() ([]byte, error)  { return []byte(d.String()), nil }
func (d *decimal) UnmarshalBinary(b []byte) error { return d.UnmarshalText(b) }
func (d decimal) String() string                  { return strconv.FormatInt(d.units, 10) }
func (d decimal) IsZero() bool                    { return d.units == 0 }
func (i isolated) IsZero() bool                   { return !i.set }
func (k textKey) MarshalText() ([]byte, error)    { return []byte("key " + k.name), nil }
func (k *textKey) UnmarshalText(b []byte) error {
	k.name = strings.TrimPrefix(string(b), "key ")
	return nil
}

// TestMsgPackEqualsJSON checks that a value arrives in MessagePack as it does in JSON.
func TestMsgPackEqualsJSON(t *testing.T) {
	t.Parallel()
	zero, one, no := decimal{}, 1, false
	parent := &tree{Name: "root"}
	for range 200 {
		parent = &tree{Name: "child", Kids: []*tree{parent}}
	}
	for name, v := range map[string]any{
		"a type with MarshalJSON": payment{"a", "b", 1, money{18725}, true},
		"a pointer to it":         &payment{"a", "b", 1, money{18725}, true},
		"a list of them":          []money{{1}, {250}},
		"a map of them":           map[string]money{"x": {1}},
		"a decimal":               decimal{5},
		"an address":              netip.MustParseAddr("10.0.0.1"),
		"a big number":            big.NewInt(1 << 60),
		"a JSON number":           json.Number("12345678901234567890.5"),
		"a raw message":           struct{ R json.RawMessage }{json.RawMessage(`{"a":[1,null]}`)},
		"text keys":               map[textKey]int{{"a"}: 1},
		"integer keys":            map[int]string{-1: "a", 300: "b"},
		"unsigned keys":           map[uint8]string{0: "a", 255: "b"},
		"named strings":           map[byteLike][]byteLike{1: {1, 2}},
		"an array of bytes":       struct{ A [3]byte }{[3]byte{1, 2, 3}},
		"an array of named bytes": struct{ A [3]byteLike }{[3]byteLike{1, 2, 3}},
		"array in a map":          map[string][2]int{"a": {1, 2}},
		"omitempty, pointer to 0": struct {
			D *decimal `json:",omitempty"`
		}{&zero},
		"omitempty, decimal": struct {
			D decimal `json:",omitempty"`
		}{},
		"omitempty, any of 0": struct {
			V any `json:",omitempty"`
		}{0.0},
		"omitempty, any of false": struct {
			V any `json:",omitempty"`
		}{false},
		"omitempty, pointer": struct {
			P *bool `json:",omitempty"`
		}{&no},
		"omitempty, address": struct {
			A netip.Addr `json:",omitempty"`
		}{},
		"omitempty, big": &struct {
			B big.Int `json:",omitempty"`
		}{},
		"omitempty, IsZero": struct {
			I isolated `json:",omitempty"`
		}{},
		"omitempty, struct": struct {
			B base `json:",omitempty"`
		}{},
		"omitempty, time": struct {
			T time.Time `json:",omitempty"`
		}{},
		"omitempty, numbers": struct {
			A, B int     `json:",omitempty"`
			C    float64 `json:",omitempty"`
			D    []int   `json:",omitempty"`
		}{D: []int{}},
		"omitempty with a space": tagged(0, `json:"a, omitempty"`),
		"omitzero": struct {
			A int       `json:",omitzero"`
			T time.Time `json:",omitzero"`
		}{},
		"string": struct {
			A int `json:",string"`
		}{5},
		"a field called -": tagged(5, `json:"-,"`),
		"a field left out": struct {
			A int `json:"-"`
			B int
		}{5, 6},
		"embedded": struct {
			Anonymous
			Own string
		}{Anonymous{"i"}, "o"},
		"embedded, unexported type": struct {
			base
			Own string
		}{base{"i", "n"}, "o"},
		"embedded with a name": struct {
			base `json:"meta"`
			ID   string `json:"id"`
		}{base{"i", "n"}, "o"},
		"embedded, exported, named": struct {
			Anonymous `json:"meta"`
		}{Anonymous{"i"}},
		"embedded, shadowed": struct {
			base
			ID string `json:"id"`
		}{base{"i", "n"}, "o"},
		"embedded pointer": struct {
			*Anonymous
			Own string
		}{&Anonymous{"i"}, "o"},
		"embedded pointer, nil": struct {
			*Anonymous
			Own string
		}{nil, "o"},
		"embedded pointer, inline": struct {
			*Anonymous `json:",inline"`
		}{&Anonymous{"i"}},
		"embedded, name taken": struct {
			Anonymous
			Own string `json:"Anonymous"`
		}{Anonymous{"i"}, "o"},
		"msgpack tag": struct {
			P float64 `msgpack:"px" json:"price"`
		}{5},
		"msgpack tag to leave out": struct {
			P float64 `msgpack:"-" json:"price"`
		}{5},
		"msgpack option": struct {
			P float64 `msgpack:",inline" json:"price"`
		}{5},
		"name with a colon": struct {
			P float64 `json:"a:b"`
		}{5},
		"name with a quote": tagged(5, `json:"a'b"`),
		"name with options": tagged(5, `json:"p,intern"`, `json:"q,alias:p"`),
		"as array": struct {
			_msgpack struct{} `msgpack:",as_array"`
			A, B     int
		}{A: 1, B: 2},
		"the same name twice": tagged(5, `json:"x"`, `json:"x"`),
		"nested deeply":       parent,
		"embedded, recursive": outer{X: 1, Next: &extended{outer: outer{X: 2, Y: 3}, Z: 4}, Y: 5},
		"embedded, pointer to a type with MarshalBinary": endpoint{&url.URL{Scheme: "http", Host: "h"}, 7},
		"embedded, type with MarshalBinary":              namedURL{url.URL{Scheme: "http", Host: "h"}, 7},
		"pointer to an empty URL":                        struct{ U *url.URL }{&url.URL{}},
		"text like an escape":                            struct{ R json.RawMessage }{json.RawMessage(`"\\ufffd"`)},
		"nil":                                            (*payment)(nil),
		"nil in everything":                              everything{},
		"pointers": struct {
			P **int
			N **int
		}{P: new(&one)},
	} {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(name, err)
		}
		want, got := reflect.New(reflect.TypeOf(v)), reflect.New(reflect.TypeOf(v))
		if err := json.Unmarshal(text, want.Interface()); err != nil {
			t.Fatal(name, err)
		}
		data, err := aegis.MsgPack.Marshal(v)
		if err == nil {
			err = aegis.MsgPack.Unmarshal(data, got.Interface())
		}
		if err != nil || !reflect.DeepEqual(got.Interface(), want.Interface()) {
			t.Errorf("%s: sent %s\n%q arrives as %+v, want %+v, error %v", name, text, data, got.Elem(), want.Elem(), err)
		}
		again, err := json.Marshal(got.Interface())
		if err != nil || !bytes.Equal(text, again) && !strings.Contains(name, "twice") {
			t.Errorf("%s: sent %s, arrives as %s, %v", name, text, again, err)
		}
	}
}

// tagged returns a struct whose fields have these tags, which go vet would not let pass, and the value n.
func tagged(n int, tags ...reflect.StructTag) any {
	var fields []reflect.StructField
	for i, tag := range tags {
		fields = append(fields, reflect.StructField{Name: string(rune('A' + i)), Type: reflect.TypeFor[int](), Tag: tag})
	}
	v := reflect.New(reflect.StructOf(fields)).Elem()
	for i := range fields {
		v.Field(i).SetInt(int64(n))
	}
	return v.Interface()
}

// TestMsgPackBetweenTypes checks what becomes of a value whose receiver has another type: what JSON makes of it, or an error.
func TestMsgPackBetweenTypes(t *testing.T) {
	t.Parallel()
	type small struct{ Qty int32 }
	for _, test := range []struct {
		name    string
		send    any
		receive any // a pointer
		want    any // nil for an error
		says    string
	}{
		{"int64 into int32", map[string]int64{"Qty": 5_000_000_000}, &small{}, nil, "Qty 5000000000 int32"},
		{"-1 into uint64", map[string]int64{"N": -1}, &struct{ N uint64 }{}, nil, "N -1"},
		{"-1 into uint8", int64(-1), new(uint8), nil, "-1 uint8"},
		{"256 into uint8", 256, new(uint8), nil, "256 uint8"},
		{"2^63 into int64", uint64(1) << 63, new(int64), nil, "9223372036854775808"},
		{"2^63 into float64", uint64(1) << 63, new(float64), float64(1 << 63), ""},
		{"2^63 into float32", uint64(1) << 63, new(float32), float32(1 << 63), ""},
		{"2^53+1 into float64", int64(1)<<53 + 1, new(float64), float64(1 << 53), ""},
		{"-5 into float64", -5, new(float64), -5.0, ""},
		{"float64 into float32", 0.1, new(float32), float32(0.1), ""},
		{"large float64 into float32", 1e300, new(float32), nil, "1e+300"},
		{"float32 into float64", float32(0.5), new(float64), 0.5, ""},
		{"fraction into int", 1.5, new(int), nil, "1.5"},
		{"bool into int", true, new(int), nil, "bool"},
		{"int into bool", 1, new(bool), nil, "number"},
		{"int into string", 1, new(string), nil, "number"},
		{"string into int", "1", new(int), nil, "string"},
		{"int8 range", -128, new(int8), int8(-128), ""},
		{"array into struct", []string{"alice", "bob"}, &struct{ A, B string }{}, nil, "array"},
		{"empty array into struct", []int{}, &struct{ A, B string }{}, nil, "array"},
		{"struct into slice", struct{ A int }{1}, &[]int{}, nil, "map"},
		{"string into struct", "x", &small{}, nil, "string"},
		{"bytes into string", []byte("x"), new(string), nil, "binary"},
		{"bytes into field", map[string][]byte{"Name": []byte("x")}, &struct{ Name string }{}, nil, "Name binary"},
		{"string into bytes", "not base 64!", &[]byte{}, nil, "base64"},
		{"base64 into bytes", "aGk=", &[]byte{}, []byte("hi"), ""},
		{"time into string", time.Unix(1e9, 0), new(string), nil, "timestamp"},
		{"string into time", "2026-11-26T10:00:00Z", &time.Time{}, time.Date(2026, 11, 26, 10, 0, 0, 0, time.UTC), ""},
		{"numbers into time", []int{1, 2}, &time.Time{}, nil, ""},
		{"text into address", "10.0.0.1", &netip.Addr{}, netip.MustParseAddr("10.0.0.1"), ""},
		{"bytes into money", map[string][]byte{"price": {1}}, &payment{}, nil, "binary"},
		{"string into money", map[string]string{"price": "5.20"}, &payment{}, payment{Price: money{520}}, ""},
		{"integer keys into string keys", map[int]string{7: "a"}, &map[string]string{}, map[string]string{"7": "a"}, ""},
		{"string keys into integer keys", map[string]string{"7": "a"}, &map[int]string{}, map[int]string{7: "a"}, ""},
		{"no number into integer keys", map[string]string{"x": "a"}, &map[int]string{}, nil, "x"},
		{"integer keys into struct", map[int]int{7: 1}, &struct {
			A int `json:"7"`
		}{}, struct {
			A int `json:"7"`
		}{1}, ""},
		{"integer keys into any", map[int]any{7: int8(7)}, new(any), map[string]any{"7": int64(7)}, ""},
		{"integer keys into map of any", map[int]any{7: uint16(7)}, &map[string]any{}, map[string]any{"7": int64(7)}, ""},
		{"boolean keys into any", map[bool]int{true: 1}, new(any), nil, "key"},
		{"longer array", []int{1, 2, 3}, &[2]int{}, nil, "array [2]int"},
		{"shorter array", []int{1}, &[2]int{}, nil, "array [2]int"},
		{"text that is no number into integer keys", map[string]int{"null": 1}, &map[int]int{}, nil, "null"},
		{"bytes into array", []byte{1, 2}, &[2]byte{}, [2]byte{1, 2}, ""},
		{"more bytes than the array", []byte{1, 2, 3}, &[2]byte{}, nil, ""},
		{"list into bytes", []int{1, 2}, &[]byte{}, []byte{1, 2}, ""},
		{"null into int", map[string]*int{"Qty": nil}, &small{}, small{}, ""},
		{"NaN", math.NaN(), new(int), nil, "NaN"},
		{"embedded struct's name", map[string]any{"Anonymous": map[string]any{"Inner": "x"}}, &struct{ Anonymous }{}, struct{ Anonymous }{}, ""},
		{"a name in another case", map[string]int{"qty": 1}, &small{}, small{1}, ""},
		{"names that differ in case", struct{ UserID int }{5}, &struct{ UserId int }{}, struct{ UserId int }{5}, ""},
		{"keys that become equal", map[int64]int{1 << 53: 1, 1<<53 + 1: 2}, &map[float64]int{}, nil, "equal"},
		{"string keys into text keys", map[string]int{"key a": 1}, &map[textKey]int{}, map[textKey]int{{"a"}: 1}, ""},
		{"old time by way of JSON", struct{ A time.Time }{time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)}, &tagged2{}, tagged2{A: time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)}, ""},
		{"an element", []map[string]any{{}, {"Qty": "x"}}, &[]small{}, nil, "[1] Qty x"},
		{"a value of a map", map[string]string{"k": "x"}, &map[string]int{}, nil, "k x int"},
	} {
		data, err := aegis.MsgPack.Marshal(test.send)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		err = aegis.MsgPack.Unmarshal(data, test.receive)
		got := reflect.ValueOf(test.receive).Elem().Interface()
		switch {
		case test.want == nil && err == nil:
			t.Errorf("%s: got %#v, want an error", test.name, got)
		case test.want != nil && (err != nil || !reflect.DeepEqual(got, test.want)):
			t.Errorf("%s: got %#v, %v, want %#v", test.name, got, err, test.want)
		}
		for word := range strings.FieldsSeq(test.says) {
			if err != nil && !strings.Contains(err.Error(), word) {
				t.Errorf("%s: the error %q does not name %q", test.name, err, word)
			}
		}
	}
}

// TestMsgPackAny checks the types that values in an any have when they arrive.
func TestMsgPackAny(t *testing.T) {
	t.Parallel()
	at := time.Unix(1e9, 5)
	type holder struct {
		V    any
		List []any
		Map  map[string]any
		Ptr  *any
		Deep []map[string]struct{ V any }
	}
	var nested any = float32(0.5)
	for _, test := range []struct{ send, want any }{
		{7, int64(7)}, {int8(-1), int64(-1)}, {300, int64(300)}, {70_000, int64(70_000)}, {uint64(7), int64(7)}, {uint64(1 << 63), uint64(1 << 63)},
		{int64(math.MaxInt64), int64(math.MaxInt64)}, {int64(math.MinInt64), int64(math.MinInt64)}, {-200, int64(-200)}, {-70_000, int64(-70_000)},
		{float32(0.5), 0.5}, {1.0, 1.0}, {"s", "s"}, {true, true}, {nil, nil}, {[]byte{1}, []byte{1}}, {[]int{1, 300}, []any{int64(1), int64(300)}},
		{struct{ A uint8 }{7}, map[string]any{"A": int64(7)}}, {map[int]uint16{-5: 300}, map[string]any{"-5": int64(300)}},
		{payment{Price: money{5}}, map[string]any{"account": "", "symbol": "", "quantity": 0.0, "price": "0.05", "buy": false}}, // sent as JSON
		{map[string]any{"a": map[string]any{"b": []any{uint8(1), 2.5}}}, map[string]any{"a": map[string]any{"b": []any{int64(1), 2.5}}}},
		{holder{V: 7, List: []any{uint8(1)}, Map: map[string]any{"a": 1}, Ptr: &nested, Deep: []map[string]struct{ V any }{{"x": {300}}}},
			map[string]any{"V": int64(7), "List": []any{int64(1)}, "Map": map[string]any{"a": int64(1)}, "Ptr": 0.5,
				"Deep": []any{map[string]any{"x": map[string]any{"V": int64(300)}}}}},
	} {
		var alone any
		var inside map[string]any
		for _, target := range []any{&alone, &inside} {
			send := test.send
			if target == any(&inside) {
				send = map[string]any{"v": send}
			}
			data, err := aegis.MsgPack.Marshal(send)
			if err == nil {
				err = aegis.MsgPack.Unmarshal(data, target)
			}
			if err != nil {
				t.Errorf("%#v: %v", test.send, err)
			}
		}
		if !reflect.DeepEqual(alone, test.want) || !reflect.DeepEqual(inside["v"], test.want) {
			t.Errorf("%#v arrives as %#v, and in a map as %#v, want %#v", test.send, alone, inside["v"], test.want)
		}
	}
	data, err := aegis.MsgPack.Marshal(holder{V: at, List: []any{uint8(1)}, Map: map[string]any{"a": 1}, Ptr: &nested,
		Deep: []map[string]struct{ V any }{{"x": {300}}}})
	var got holder
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &got)
	}
	if err != nil || !got.V.(time.Time).Equal(at) || got.List[0] != int64(1) || got.Map["a"] != int64(1) || *got.Ptr != any(0.5) ||
		got.Deep[0]["x"].V != int64(300) {
		t.Errorf("got %#v, %v", got, err)
	}
}

// Decoding allocates only what the value needs.
func TestMsgPackAllocations(t *testing.T) {
	type numbers struct {
		A, B int64
		C    float64
		E    bool
	}
	data, err := aegis.MsgPack.Marshal(numbers{1, -5_000_000_000, 0.5, true})
	if err != nil {
		t.Fatal(err)
	}
	var n numbers
	var target any = &n
	if allocs := testing.AllocsPerRun(100, func() { err = errors.Join(err, aegis.MsgPack.Unmarshal(data, target)) }); allocs > 0 || err != nil {
		t.Errorf("%v allocations, error %v; want none", allocs, err)
	}
}

// TestMsgPackOneByte checks that a payload of one byte has one reading.
func TestMsgPackOneByte(t *testing.T) {
	t.Parallel()
	for n := range 300 {
		data, err := aegis.MsgPack.Marshal(n)
		var got int
		if err == nil {
			err = aegis.MsgPack.Unmarshal(data, &got)
		}
		if err != nil || got != n || len(data) == 1 && data[0] >= 48 && data[0] <= 57 {
			t.Errorf("%d is sent as %x and arrives as %d, %v", n, data, got, err)
		}
	}
	var got int
	if err := aegis.MsgPack.Unmarshal([]byte{0x37}, &got); err != nil || got != 0x37 { // as other libraries send it, labelled
		t.Error(got, err)
	}
	data, err := aegis.MsgPack.Marshal(digit(7))
	var d digit
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &d)
	}
	if err != nil || d != 7 {
		t.Errorf("%q arrives as %d, %v", data, d, err)
	}
}

type digit int

func (d digit) MarshalJSON() ([]byte, error)  { return strconv.AppendInt(nil, int64(d), 10), nil }
func (d *digit) UnmarshalJSON(b []byte) error { *d = digit(b[0] - '0'); return nil }

// TestMsgPackCarriesMoreThanJSON checks values that JSON can't express.
func TestMsgPackCarriesMoreThanJSON(t *testing.T) {
	t.Parallel()
	for _, v := range []any{
		math.Inf(1), math.Inf(-1), float32(math.Inf(1)), "not \xff UTF-8", map[float64]int{0.5: 1}, map[bool]string{true: "x"},
		struct{ F []float64 }{[]float64{math.Inf(-1), 0}}, &url.URL{Scheme: "http", Host: "host", RawQuery: "a=b"}, &url.URL{}, []*url.URL{{Host: "h", User: url.UserPassword("a", "b")}, {}},
		map[string]url.URL{"a": {Host: "h", User: url.User("u")}}, [2]binaryOnly{{5}},
		struct{ U *url.URL }{&url.URL{Path: "/p"}}, time.Date(20000, 1, 1, 0, 0, 0, 0, time.Local),
	} {
		data, err := aegis.MsgPack.Marshal(v)
		got := reflect.New(reflect.TypeOf(v))
		if err == nil {
			err = aegis.MsgPack.Unmarshal(data, got.Interface())
		}
		if err != nil || !reflect.DeepEqual(got.Elem().Interface(), v) {
			t.Errorf("%#v arrives as %#v, %v", v, got.Elem(), err)
		}
	}
	data, err := aegis.MsgPack.Marshal(math.NaN())
	var got float64
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &got)
	}
	if err != nil || !math.IsNaN(got) {
		t.Error(got, err)
	}
}

// TestMsgPackFailsLikeJSON checks values that neither format can carry: an error, never a panic or a stack overflow.
func TestMsgPackFailsLikeJSON(t *testing.T) {
	t.Parallel()
	cycle := &tree{Name: "a"}
	cycle.Kids = []*tree{{Name: "b", Parent: cycle}}
	self := map[string]any{}
	self["self"] = self
	list := []any{1, nil}
	list[1] = &list
	type node struct{ Next any }
	ring := &node{}
	ring.Next = ring
	type endless map[string]endless
	turtles := endless{}
	turtles["down"] = turtles
	for name, v := range map[string]any{
		"a tree whose child points to its parent": cycle,
		"a map that contains itself":              self,
		"a list that contains itself":             list,
		"a ring through an any":                   ring,
		"a map of its own type":                   turtles,
		"a channel":                               make(chan int),
		"a function":                              struct{ F func() }{},
		"a complex number":                        struct{ C complex128 }{},
		"a channel in an any":                     map[string]any{"c": make(chan int)},
		"struct keys":                             map[struct{ A int }]int{{1}: 1},
		"keys of any type":                        map[any]any{1: 1},
		"a MarshalJSON that panics":               panics{},
		"one in an any":                           map[string]any{"p": &panics{}},
		"a MarshalJSON that fails":                refuses{},
	} {
		if data, err := aegis.MsgPack.Marshal(v); err == nil {
			t.Errorf("%s: sent as %q, want an error", name, data)
		}
	}
	for _, target := range []any{nil, 5, (*int)(nil), &panics{}} {
		for _, data := range []string{`{"a":1}`, "\x81\xa1a\x01"} {
			if err := aegis.MsgPack.Unmarshal([]byte(data), target); err == nil {
				t.Errorf("Unmarshal into %T: no error", target)
			}
		}
	}
}

type (
	panics  struct{}
	refuses struct{}
)

func (panics) MarshalJSON() ([]byte, error)  { panic("MarshalJSON") }
func (*panics) UnmarshalJSON([]byte) error   { panic("UnmarshalJSON") }
func (refuses) MarshalJSON() ([]byte, error) { return nil, errors.New("no") }

// TestMsgPackReusedTarget checks that Unmarshal treats what the target holds already as encoding/json does.
func TestMsgPackReusedTarget(t *testing.T) {
	t.Parallel()
	type inner struct{ A, B int }
	type target struct {
		N    int
		P    *inner
		M    map[string]int
		L    []inner
		Any  any
		S, U string
	}
	fresh := func() *target {
		return &target{N: 1, P: &inner{1, 2}, M: map[string]int{"old": 1}, L: []inner{{1, 2}, {3, 4}}, Any: []any{"x"}, S: "s", U: "u"}
	}
	update := map[string]any{"N": nil, "P": map[string]any{"A": 5}, "M": map[string]any{"new": 2}, "L": []any{map[string]any{"A": 9}}, "Any": "y", "S": nil}
	text, _ := json.Marshal(update)
	data, err := aegis.MsgPack.Marshal(update)
	want, got := fresh(), fresh()
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, got)
	}
	if json.Unmarshal(text, want) != nil || err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v, error %v", got, want, err)
	}
	var v any
	for _, send := range []any{[]byte{1}, 7, map[string]any{"a": 1}, nil, "s"} {
		data, _ := aegis.MsgPack.Marshal(send)
		var once any
		if err1, err2 := aegis.MsgPack.Unmarshal(data, &v), aegis.MsgPack.Unmarshal(data, &once); err1 != nil || err2 != nil || !reflect.DeepEqual(v, once) {
			t.Errorf("again: %#v, into a new any: %#v, %v, %v", v, once, err1, err2)
		}
	}
}

// TestMsgPackOfOlderVersions checks that payloads of v0.1.0 are still understood: these are stored in streams.
func TestMsgPackOfOlderVersions(t *testing.T) {
	t.Parallel()
	enc := func(v any) []byte {
		var buf bytes.Buffer
		e := msgpack.NewEncoder(&buf)
		e.SetCustomStructTag("json")
		e.UseCompactInts(true)
		if err := e.Encode(v); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	type order struct {
		ID    decimal // as MarshalBinary made it
		From  netip.Addr
		Bytes [2]byte
		At    time.Time
		Tree  *tree
	}
	in := order{decimal{5}, netip.MustParseAddr("::1"), [2]byte{1, 2}, time.Unix(1e9, 0), &tree{Name: "a", Kids: []*tree{{Name: "b"}}}}
	var out order
	if err := aegis.MsgPack.Unmarshal(enc(in), &out); err != nil || !reflect.DeepEqual(in, out) {
		t.Errorf("got %+v, %v, want %+v", out, err, in)
	}
}

// TestValuesOverTheWire checks that each kind of message delivers what was sent, or an error.
func TestValuesOverTheWire(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	want := payment{"ACC", "AAPL", 5, money{18725}, true}
	equal := func(what string, got payment, err error) {
		t.Helper()
		if err != nil || got != want {
			t.Errorf("%s: got %+v, %v, want %+v", what, got, err, want)
		}
	}
	handle(t, svc, "same", func(_ context.Context, p payment) (payment, error) { equal("request", p, nil); return p, nil })
	handle(t, svc, "small", func(_ context.Context, m map[string]int32) (int32, error) { return m["qty"], nil })
	handle(t, svc, "large", func(context.Context, struct{}) (int64, error) { return 5_000_000_000, nil })
	handle(t, svc, "unsigned", func(_ context.Context, n uint64) (uint64, error) { return n, nil })
	handle(t, svc, "any", func(_ context.Context, v any) (any, error) { return v, nil })
	var events journal[payment]
	subscribe(t, svc, "order.paid", into(&events))
	handleCommand(t, svc, "pay", func(_ context.Context, c *aegis.Command[payment]) (payment, error) {
		equal("command", c.Data, nil)
		return c.Data, nil
	})
	start(t, svc)

	got, err := call[payment, payment](client, "svc", "same", want)
	equal("answer", got, err)
	publish(t, client, "order", "paid", want)
	equal("event", events.wait(t, 1)[0], nil)
	equal("result", wait(t, send[payment, payment](t, client, "svc", "pay", want)), nil)

	_, err = call[map[string]int64, int32](client, "svc", "small", map[string]int64{"qty": 5_000_000_000})
	if e := fails(t, err, aegis.ErrInvalid, "map[string]int32", "qty", "5000000000", "int32"); !e.NotRun {
		t.Error("NotRun = false, want true")
	}
	_, err = call[struct{}, int32](client, "svc", "large", struct{}{})
	if e := fails(t, err, aegis.ErrInternal, "svc.large", "int32", "5000000000"); e.NotRun {
		t.Error("NotRun = true, want false")
	}
	_, err = call[int64, uint64](client, "svc", "unsigned", -1)
	fails(t, err, aegis.ErrInvalid, "uint64", "-1")
	_, err = call[[]string, payment](client, "svc", "same", []string{"alice", "bob"})
	if e := fails(t, err, aegis.ErrInvalid, "aegis_test.payment", "array"); strings.Contains(e.Message, "*aegis_test") {
		t.Errorf("the error %q names a pointer", e.Message)
	}
	v, err := call[any, any](client, "svc", "any", map[string]any{"a": 7, "b": 300, "c": -1, "d": map[int]int{7: 1}})
	if want := map[string]any{"a": int64(7), "b": int64(300), "c": int64(-1), "d": map[string]any{"7": int64(1)}}; err != nil || !reflect.DeepEqual(v, any(want)) {
		t.Errorf("got %#v, %v, want %#v", v, err, want)
	}
}

// TestValuesThatCannotBeSent checks that nothing that a user's type does panics out of a call, a publish or a command, or ends
// the process.
func TestValuesThatCannotBeSent(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	cycle := &tree{Name: "a"}
	cycle.Kids = []*tree{{Name: "b", Parent: cycle}}
	self := map[string]any{}
	self["self"] = self
	for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, clumsy{}} {
		svc := newService(t, srv, "svc", aegis.WithCodec(codec))
		handle(t, svc, "panics", func(context.Context, string) (panics, error) { return panics{}, nil })
		handle(t, svc, "cycle", func(context.Context, string) (*tree, error) { return cycle, nil })
		handle(t, svc, "take", func(context.Context, panics) (string, error) { return "", nil })
		start(t, svc)
		for _, v := range []any{cycle, self, panics{}, make(chan int), func() {}} {
			_, err := call[any, string](svc, "svc", "cycle", v)
			if e := fails(t, err, aegis.ErrInvalid, "svc.cycle"); !e.NotRun {
				t.Errorf("%T: NotRun = false, want true", v)
			}
			err = aegis.Publish(t.Context(), svc, "order", "created", v)
			if e := fails(t, err, aegis.ErrInvalid, "order.created"); !e.NotRun {
				t.Errorf("%T: NotRun = false, want true", v)
			}
			fails(t, aegis.PublishBatch(t.Context(), svc, "order", "created", []any{v}), aegis.ErrInvalid, "order.created")
			_, err = aegis.SendCommand[any, string](t.Context(), svc, "svc", "run", v)
			fails(t, err, aegis.ErrInvalid, "svc.run")
		}
		if codec == (clumsy{}) {
			continue
		}
		_, err := call[string, string](svc, "svc", "panics", "")
		fails(t, err, aegis.ErrInternal, "panics")
		_, err = call[string, string](svc, "svc", "cycle", "")
		fails(t, err, aegis.ErrInternal, "cycle")
		_, err = call[map[string]int, string](svc, "svc", "take", map[string]int{"a": 1})
		fails(t, err, aegis.ErrInvalid, "svc.take", "UnmarshalJSON")
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// clumsy is a codec that panics.
type clumsy struct{}

func (clumsy) ContentType() string         { return "application/clumsy" }
func (clumsy) Marshal(any) ([]byte, error) { panic("clumsy") }
func (clumsy) Unmarshal([]byte, any) error { panic("clumsy") }

// TestPayloadOfOtherClients checks payloads that clients without aegis send, and answers of services without it.
func TestPayloadOfOtherClients(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handle(t, svc, "limit", func(_ context.Context, n int) (int, error) { return n, nil })
	handle(t, svc, "any", func(_ context.Context, v any) (string, error) { return fmt.Sprintf("%T %v", v, v), nil })
	start(t, svc)
	nc := client.Conn()
	ask := func(method, data, label string) *nats.Msg {
		t.Helper()
		m := nats.NewMsg("rpc.svc." + method)
		m.Data = []byte(data)
		if label != "" {
			m.Header.Set("Content-Type", label)
		}
		answer, err := nc.RequestMsg(m, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	for _, test := range []struct{ data, label, answer string }{
		{"7", "", "7 "}, {"7", "application/json", "7 "}, {"55", "", "55"}, {" 7", "", "7 "}, {"\x07", "", "\x07"},
		{"7", "application/msgpack", "\xd07"}, {"\x07", "application/msgpack; v=1", "\x07"}, {"\xcc\xc8", "", "\xcc\xc8"},
	} {
		if m := ask("limit", test.data, test.label); string(m.Data) != test.answer || len(m.Header) > 0 {
			t.Errorf("%q (%s) is answered with %q, %v, want %q", test.data, test.label, m.Data, m.Header, test.answer)
		}
	}
	for _, test := range []struct{ data, label, says string }{
		{"\xef\xbb\xbf{}", "", "byte order mark"}, {"\xef\xbb\xbf7", "application/json", "byte order mark"}, {"\xff\xfe7\x00", "", "byte order mark"},
		{"", "", "empty"}, {"5000000000000000000000", "", "int"}, {"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00", "", "the number 1.5 does not fit int"},
	} {
		m := ask("limit", test.data, test.label)
		if text := m.Header.Get("Nats-Service-Error"); m.Header.Get("Nats-Service-Error-Code") != "400" || !strings.Contains(text, test.says) {
			t.Errorf("%q: got %v, want 400 with %q", test.data, m.Header, test.says)
		}
	}
	var answer string
	if err := json.Unmarshal(ask("any", `{"a":7}`, "").Data, &answer); err != nil || answer != "map[string]interface {} map[a:7]" {
		t.Error(answer, err)
	}
	sub, err := nc.Subscribe("rpc.other.limit", func(m *nats.Msg) { _ = m.Respond([]byte("7")) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, err := call[int, int](client, "other", "limit", 1); err != nil || n != 7 {
		t.Errorf("got %d, %v, want 7", n, err)
	}
}

// TestRaw passes payloads of each format on, as every kind of message.
func TestRaw(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	type Raw = aegis.Raw
	for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, gobbledygook{}} {
		name := "relay-" + strings.TrimPrefix(codec.ContentType(), "application/")
		client := newService(t, srv, "client", aegis.WithCodec(codec))
		relay := newService(t, srv, name, aegis.WithCodec(codec))
		target := newService(t, srv, "target-"+name, aegis.WithCodec(codec))
		handle(t, target, "same", func(_ context.Context, v map[string]int) (map[string]int, error) { return v, nil })
		handle(t, relay, "same", func(_ context.Context, r Raw) (Raw, error) { return call[Raw, Raw](relay, "target-"+name, "same", r) })
		handle(t, relay, "digit", func(_ context.Context, r Raw) (Raw, error) { return r, nil })
		handle(t, relay, "nothing", func(context.Context, Raw) (Raw, error) { return Raw{}, nil })
		events := make(chan Raw, 10)
		subscribe(t, relay, "order.*", func(ctx context.Context, e aegis.Event[Raw]) error {
			events <- e.Data
			if e.Type == "copy" {
				return nil
			}
			return aegis.Publish(ctx, relay, "order", "copy", e.Data)
		})
		handleCommand(t, target, "run", func(_ context.Context, c *aegis.Command[map[string]int]) (map[string]int, error) { return c.Data, nil })
		handleCommand(t, relay, "run", func(ctx context.Context, c *aegis.Command[Raw]) (Raw, error) {
			j, err := aegis.SendCommand[Raw, Raw](ctx, relay, "target-"+name, "run", c.Data)
			if err != nil {
				return Raw{}, err
			}
			return j.Wait(ctx)
		})
		start(t, target)
		start(t, relay)

		sent := map[string]int{"a": 7, "b": 5_000_000}
		check := func(what string, got map[string]int, err error) {
			t.Helper()
			if err != nil || !maps.Equal(got, sent) {
				t.Errorf("%s: %s: got %v, %v, want %v", codec.ContentType(), what, got, err, sent)
			}
		}
		got, err := call[map[string]int, map[string]int](client, name, "same", sent)
		check("call", got, err)
		publish(t, client, "order", "created", sent)
		for range 2 {
			r := <-events
			var got map[string]int
			err := r.Decode(&got)
			check("event", got, err)
			var wrong []string
			fails(t, r.Decode(&wrong), aegis.ErrInvalid, "[]string")
			fails(t, r.Decode(nil), aegis.ErrInvalid)
			fails(t, r.Decode(5), aegis.ErrInvalid, "int")
		}
		check("command", wait(t, send[map[string]int, map[string]int](t, client, name, "run", sent)), nil)
		for n := range 130 {
			if got, err := call[int, int](client, name, "digit", n); err != nil || got != n {
				t.Errorf("%d comes back as %d, %v", n, got, err)
			}
		}
		r, err := call[int, Raw](client, name, "nothing", 1)
		if err != nil {
			t.Error(err)
		}
		fails(t, r.Decode(new(int)), aegis.ErrInvalid, "empty")
		_, err = call[Raw, map[string]int](client, "target-"+name, "same", Raw{})
		fails(t, err, aegis.ErrInvalid, "empty")
		if err := errors.Join(relay.Stop(t.Context()), target.Stop(t.Context())); err != nil {
			t.Error(err)
		}
	}

	// A format that no service supports passes, too.
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handle(t, svc, "same", func(_ context.Context, r Raw) (Raw, error) {
		var v any
		fails(t, r.Decode(&v), aegis.ErrInvalid, "text/xml")
		return r, nil
	})
	handle(t, svc, "other", func(context.Context, Raw) (string, error) { return "aegis's own", nil })
	start(t, svc)
	for method, want := range map[string][2]string{"same": {"<x/>", "text/xml"}, "other": {"\xabaegis's own", ""}} {
		m, err := client.Conn().RequestMsg(&nats.Msg{Subject: "rpc.svc." + method, Data: []byte("<x/>"), Header: nats.Header{"Content-Type": {"text/xml"}}}, 5*time.Second)
		if err != nil || string(m.Data) != want[0] || m.Header.Get("Content-Type") != want[1] {
			t.Errorf("%s: got %q, %v, %v", method, m.Data, m.Header, err)
		}
	}

	// As a part of another value, it is a part of the JSON.
	type envelope struct{ Inner Raw }
	var e envelope
	if err := aegis.MsgPack.Unmarshal([]byte(`{"Inner":{"a":[1]}}`), &e); err != nil {
		t.Fatal(err)
	}
	var inner map[string][]int
	if err := e.Inner.Decode(&inner); err != nil || inner["a"][0] != 1 {
		t.Error(inner, err)
	}
	if data, err := aegis.MsgPack.Marshal(e); err != nil || string(data) != `{"Inner":{"a":[1]}}` {
		t.Errorf("got %q, %v", data, err)
	}
	r, err := call[string, Raw](client, "svc", "other", "x")
	if err != nil {
		t.Fatal(err)
	}
	if data, err := aegis.MsgPack.Marshal(envelope{r}); err == nil {
		t.Errorf("got %q, want an error", data)
	}
}

func TestDeadLetterDecode(t *testing.T) {
	t.Parallel()
	for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, gobbledygook{}} {
		srv := startServer(t, withJetStream(t))
		svc := newService(t, srv, "risk", aegis.WithCodec(codec))
		subscribe(t, svc, "order.paid", func(context.Context, aegis.Event[payment]) error { return errors.New("no") }, aegis.Attempts(1))
		start(t, svc)
		want := payment{"ACC", "AAPL", 5, money{18725}, true}
		publish(t, svc, "order", "paid", want)
		var letter aegis.DeadLetter
		eventually(t, "the dead letter is stored", func() bool {
			for d, err := range svc.DeadLetters(t.Context()) {
				if err != nil {
					t.Fatal(err)
				}
				letter = d
			}
			return letter.Sequence > 0
		})
		var got payment
		var r aegis.Raw
		if err := letter.Decode(&got); err != nil || got != want {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
		if err := letter.Decode(&r); err != nil {
			t.Error(err)
		}
		var wrong int
		fails(t, letter.Decode(&wrong), aegis.ErrInvalid, "int")
		fails(t, aegis.DeadLetter{}.Decode(&wrong), aegis.ErrInvalid, "empty")
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// TestTextIsCutBetweenCharacters checks that long texts stay valid UTF-8.
func TestTextIsCutBetweenCharacters(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	long := strings.Repeat("€", 2000) // of three bytes each
	handle(t, svc, "m", func(_ context.Context, s string) (string, error) { return "", errors.New(s) })
	handleCommand(t, svc, "run", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		if err := c.Progress(50, c.Data); err != nil {
			t.Error(err)
		}
		return "", errors.New(c.Data)
	}, aegis.Attempts(1))
	start(t, svc)
	for _, text := range []string{long, "x" + long, "xx" + long, "a\xffb", "\xe2\x82"} {
		whole := func(what, s string) {
			t.Helper()
			if !utf8.ValidString(s) || strings.ContainsRune(s, utf8.RuneError) || strings.Contains(s, "€?") || !strings.Contains(s, strings.ToValidUTF8(text, "?")[:1]) {
				t.Errorf("%s of %.9q: got %.9q... %q", what, text, s, s[max(len(s)-9, 0):])
			}
		}
		m, err := client.Conn().Request("rpc.svc.m", []byte(`"`+strings.ToValidUTF8(text, "?")+`"`), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		whole("header", m.Header.Get("Nats-Service-Error"))
		_, err = call[string, string](client, "svc", "m", text)
		whole("error", fails(t, err, aegis.ErrInternal).Message)
		job := send[string, string](t, client, "svc", "run", text)
		for p, err := range job.Updates(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			if p.Percent == 50 {
				whole("progress", p.Message)
			}
		}
		_, err = job.Wait(t.Context())
		whole("outcome", fails(t, err, aegis.ErrInternal).Message)
	}
	for d, err := range svc.DeadLetters(t.Context()) {
		if err != nil || !utf8.ValidString(d.Reason) || strings.Contains(d.Reason, "€?") {
			t.Errorf("reason %q, %v", d.Reason, err)
		}
	}
}

// TestMsgPackDepth checks that what Marshal sends is not too deep for Unmarshal, and that an error is short.
func TestMsgPackDepth(t *testing.T) {
	t.Parallel()
	for levels := range 140 {
		for _, leaf := range []any{[]int{1}, map[string][][]int{"a": {{1}}}, struct{ A [][]byte }{[][]byte{{1}}}} {
			v := leaf
			for range levels {
				v = []any{v}
			}
			var got any
			data, err := aegis.MsgPack.Marshal(v)
			if err == nil {
				err = aegis.MsgPack.Unmarshal(data, &got)
			}
			if err != nil {
				t.Errorf("%T in %d levels: %v", leaf, levels, err)
			}
		}
	}
	data := bytes.Repeat([]byte("\x81\xa1a"), 127)
	data = append(append(append(data, 0x81, 0xdb, 0, 0x10, 0, 0), bytes.Repeat([]byte("k"), 1<<20)...), 0xd4, 5, 5)
	var got any
	if err := aegis.MsgPack.Unmarshal(data, &got); err == nil || len(err.Error()) > 10_000 {
		t.Errorf("the error has %d bytes", len(err.Error()))
	}
	escaped := map[string]any{"R": `\ufffd`}
	data, err := aegis.MsgPack.Marshal(escaped)
	var raw struct{ R json.RawMessage }
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &raw)
	}
	if err != nil || string(raw.R) != `"\\ufffd"` {
		t.Errorf("got %s, %v", raw.R, err)
	}
}

// FuzzMsgPack checks that malformed input causes no panic, and no more allocations than are proportionate to its length.
func FuzzMsgPack(f *testing.F) {
	for _, v := range []any{1, "s", []int{1, 2}, map[string]any{"i": 1, "L": []string{"a"}, "P": map[string]any{"M": map[string]int{"x": 1}}}, everything{}} {
		data, err := aegis.MsgPack.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte{0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'L', 0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'M', 0xdf, 0x00, 0xff, 0xff, 0xff})
	f.Add(bytes.Repeat([]byte{0x91}, 200))
	element := uint64(reflect.TypeFor[everything]().Size())
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var list []everything
		_ = aegis.MsgPack.Unmarshal(data, &list)
		var one everything
		_ = aegis.MsgPack.Unmarshal(data, &one)
		var v any
		_ = aegis.MsgPack.Unmarshal(data, &v)
		runtime.ReadMemStats(&after)
		if got, most := after.TotalAlloc-before.TotalAlloc, 256<<10+uint64(len(data))*4*element; got > most {
			t.Errorf("%d bytes of input took %d bytes of memory, want at most %d", len(data), got, most)
		}
	})
}

// FuzzMsgPackEqualsJSON generates types and values of them.
func FuzzMsgPackEqualsJSON(f *testing.F) {
	for seed := range uint64(10) {
		f.Add(randomTape(seed))
	}
	f.Fuzz(compareWithJSON)
}

// TestMsgPackEqualsJSONGenerated does the same with more types than a fuzzing engine finds in a short time.
func TestMsgPackEqualsJSONGenerated(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20_000) {
		compareWithJSON(t, randomTape(seed))
		if t.Failed() {
			t.Fatal("seed", seed)
		}
	}
}

func randomTape(seed uint64) []byte {
	r := rand.New(rand.NewPCG(1, seed))
	tape := make([]byte, 16+r.IntN(150))
	for i := range tape {
		tape[i] = byte(r.Uint32())
	}
	return tape
}

// compareWithJSON generates a type and a value of it from the tape. In MessagePack it has to arrive as it does in JSON, or as
// it was sent. The same payload is then decoded into another type, where MessagePack may fail, but must not give anything else
// than JSON.
func compareWithJSON(t *testing.T, tape []byte) {
	g := &generator{tape: tape}
	sent := reflect.New(g.anyType(0))
	g.fill(sent.Elem(), 0)
	text, failed := json.Marshal(sent.Interface())
	packed, err := aegis.MsgPack.Marshal(sent.Interface())
	if failed == nil && err != nil {
		t.Fatalf("%T: JSON can carry %s, MessagePack fails: %v", sent.Interface(), text, err)
	}
	if err != nil {
		return
	}
	decode := func(typ reflect.Type) (want, got reflect.Value, failed, err error) {
		want, got = reflect.New(typ), reflect.New(typ)
		if failed = failedOf(text, want); text == nil {
			failed = errors.New("JSON can't carry it")
		}
		return want.Elem(), got.Elem(), failed, aegis.MsgPack.Unmarshal(packed, got.Interface())
	}
	want, got, failed, err := decode(sent.Type().Elem())
	switch {
	case failed == nil && err != nil:
		t.Fatalf("%T: JSON decodes %s, MessagePack %q fails: %v", sent.Interface(), text, packed, err)
	case err == nil && !(failed == nil && alike(got, want, false)) && !alike(got, sent.Elem(), failed != nil):
		t.Fatalf("%T: sent %s, %#v; MessagePack %q arrives as %#v, want %#v, %v", sent.Interface(), text, sent.Elem(), packed, got, want, failed)
	}
	want, got, failed, err = decode(g.variant(sent.Type().Elem(), 0))
	types := fmt.Sprint(sent.Type(), got.Type())
	switch {
	case text == nil || err != nil:
	case failed == nil && !alike(got, want, true), failed != nil && !moreThanJSON.MatchString(types):
		t.Fatalf("%T into %v: sent %s, MessagePack %q arrives as %#v, want %#v, %v", sent.Interface(), got.Type(), text, packed, got, want, failed)
	}
	var any1, any2 any
	if failedOf(text, reflect.ValueOf(&any1)) == nil && aegis.MsgPack.Unmarshal(packed, &any2) == nil && text != nil &&
		!alike(reflect.ValueOf(&any2).Elem(), reflect.ValueOf(&any1).Elem(), true) {
		t.Fatalf("%T into any: sent %s, MessagePack %q arrives as %#v, want %#v", sent.Interface(), text, packed, any2, any1)
	}
}

// moreThanJSON matches types between which MessagePack carries what JSON can't: binary data into an array, for example.
var moreThanJSON = regexp.MustCompile(`]uint8|binaryOnly|everything|interface|map\[(float64|bool)`)

func failedOf(text []byte, into reflect.Value) error { return json.Unmarshal(text, into.Interface()) }

// A generator makes types and values from the bytes of a tape.
type generator struct{ tape []byte }

func (g *generator) pick(n int) int {
	if len(g.tape) == 0 {
		return 0
	}
	c := g.tape[0]
	g.tape = g.tape[1:]
	return int(c) % n
}

func (g *generator) bits() (n uint64) {
	for range g.pick(9) {
		n = n<<8 | uint64(g.pick(256))
	}
	return n
}

var leafTypes = []reflect.Type{
	reflect.TypeFor[bool](), reflect.TypeFor[int](), reflect.TypeFor[int8](), reflect.TypeFor[int16](), reflect.TypeFor[int32](),
	reflect.TypeFor[int64](), reflect.TypeFor[uint](), reflect.TypeFor[uint8](), reflect.TypeFor[uint16](), reflect.TypeFor[uint32](),
	reflect.TypeFor[uint64](), reflect.TypeFor[float32](), reflect.TypeFor[float64](), reflect.TypeFor[string](), reflect.TypeFor[[]byte](),
	reflect.TypeFor[[3]byte](), reflect.TypeFor[time.Time](), reflect.TypeFor[any](), reflect.TypeFor[json.RawMessage](),
	reflect.TypeFor[netip.Addr](), reflect.TypeFor[decimal](), reflect.TypeFor[money](), reflect.TypeFor[binaryOnly](), reflect.TypeFor[byteLike](),
	reflect.TypeFor[time.Duration](), reflect.TypeFor[json.Number](), reflect.TypeFor[base](), reflect.TypeFor[Anonymous](), reflect.TypeFor[tree](),
	reflect.TypeFor[everything](), reflect.TypeFor[payment](), reflect.TypeFor[struct {
		base
		Own any
	}](), reflect.TypeFor[struct {
		*Anonymous
		Own int
	}](), reflect.TypeFor[struct {
		base `json:"meta"`
		ID   string `json:"id"`
	}](), reflect.TypeFor[struct {
		Anonymous
		Inner int
	}](),
}

// binaryOnly has no methods but those for binary data.
type binaryOnly struct{ n uint16 }

func (b binaryOnly) MarshalBinary() ([]byte, error) {
	return binary.BigEndian.AppendUint16(nil, b.n), nil
}
func (b *binaryOnly) UnmarshalBinary(data []byte) error {
	if len(data) != 2 {
		return errors.New("want 2 bytes")
	}
	b.n = binary.BigEndian.Uint16(data)
	return nil
}

var keyTypes = []reflect.Type{
	reflect.TypeFor[string](), reflect.TypeFor[int8](), reflect.TypeFor[int](), reflect.TypeFor[uint64](), reflect.TypeFor[textKey](),
	reflect.TypeFor[byteLike](), reflect.TypeFor[bool](), reflect.TypeFor[float64](),
}

var someTags = []reflect.StructTag{
	``, ``, `json:"t1"`, `json:"t2,omitempty"`, `json:",omitempty"`, `json:"-"`, `json:"-,"`, `json:",omitzero"`, `json:",string"`,
	`msgpack:"x" json:"t3"`, `json:"t:4"`, `json:"t'5"`, `json:"t6,inline"`, `json:"t7, omitempty"`, `json:"ü"`, `json:"a b"`,
}

func (g *generator) anyType(depth int) reflect.Type {
	kind := g.pick(12)
	switch {
	case depth > 3 || kind < 6:
		return leafTypes[g.pick(len(leafTypes))]
	case kind == 6:
		return reflect.SliceOf(g.anyType(depth + 1))
	case kind == 7:
		return reflect.ArrayOf(g.pick(4), g.anyType(depth+1))
	case kind == 8:
		return reflect.MapOf(keyTypes[g.pick(len(keyTypes))], g.anyType(depth+1))
	case kind == 9:
		return reflect.PointerTo(g.anyType(depth + 1))
	}
	var fields []reflect.StructField
	for i := range g.pick(5) {
		fields = append(fields, reflect.StructField{Name: string(rune('A' + i)), Type: g.anyType(depth + 1), Tag: someTags[g.pick(len(someTags))]})
	}
	return reflect.StructOf(fields)
}

// variant returns a type of the same structure, with other leaves.
func (g *generator) variant(t reflect.Type, depth int) reflect.Type {
	switch {
	case t.Name() != "" || t.Kind() == reflect.Interface:
		if g.pick(3) == 0 {
			return t
		}
		return leafTypes[g.pick(len(leafTypes))]
	case t.Kind() == reflect.Slice:
		return reflect.SliceOf(g.variant(t.Elem(), depth+1))
	case t.Kind() == reflect.Array:
		return reflect.ArrayOf(t.Len(), g.variant(t.Elem(), depth+1))
	case t.Kind() == reflect.Map:
		return reflect.MapOf(keyTypes[g.pick(len(keyTypes))], g.variant(t.Elem(), depth+1))
	case t.Kind() == reflect.Pointer:
		return g.variant(t.Elem(), depth+1)
	}
	var fields []reflect.StructField
	for i := range t.NumField() {
		f := t.Field(i)
		if f.PkgPath != "" || f.Anonymous {
			return t
		}
		fields = append(fields, reflect.StructField{Name: f.Name, Type: g.variant(f.Type, depth+1), Tag: f.Tag})
	}
	return reflect.StructOf(fields)
}

// fill gives v a value.
func (g *generator) fill(v reflect.Value, depth int) {
	if depth > 8 {
		return
	}
	switch p := v.Addr().Interface().(type) {
	case *time.Time:
		*p = time.Unix(int64(g.bits()>>28), int64(g.pick(2)*g.pick(256)*1000)).UTC()
		return
	case *json.RawMessage:
		*p = json.RawMessage([]string{`1`, `"x"`, `{"a":[true]}`, `null`}[g.pick(4)])
		return
	case *netip.Addr:
		if g.pick(2) == 0 {
			*p = netip.AddrFrom4([4]byte{10, 0, 0, byte(g.pick(256))})
		}
		return
	case *decimal:
		p.units = int64(g.bits())
		return
	case *money:
		p.cents = int64(g.pick(256))
		return
	case *binaryOnly:
		p.n = uint16(g.bits())
		return
	case *textKey:
		p.name = string(rune('a' + g.pick(26)))
		return
	case *json.Number:
		*p = json.Number([]string{"0", "1.5", "-7", "1e3"}[g.pick(4)])
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(g.pick(2) == 1)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(g.bits()))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(g.bits())
	case reflect.Float32, reflect.Float64:
		switch g.pick(3) {
		case 0:
			v.SetFloat(float64(int8(g.pick(256))))
		case 1:
			v.SetFloat(float64(g.pick(256)) / 10)
		default:
			v.SetFloat(math.Float64frombits(g.bits() << 2))
		}
	case reflect.String:
		v.SetString([]string{"", "x", "7", "ü", "\xff", "aGk=", "<&>", `\ufffd`}[g.pick(8)])
	case reflect.Slice:
		if n := g.pick(4); n > 0 {
			v.Set(reflect.MakeSlice(v.Type(), n-1, n-1))
		}
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			g.fill(v.Index(i), depth+1)
		}
	case reflect.Map:
		if n := g.pick(4); n > 0 {
			v.Set(reflect.MakeMap(v.Type()))
			for range n - 1 {
				key, elem := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
				g.fill(key, depth+1)
				g.fill(elem, depth+1)
				v.SetMapIndex(key, elem)
			}
		}
	case reflect.Pointer:
		if g.pick(3) > 0 {
			v.Set(reflect.New(v.Type().Elem()))
			g.fill(v.Elem(), depth+1)
		}
	case reflect.Interface:
		if g.pick(4) > 0 {
			x := reflect.New(g.anyType(2)).Elem()
			g.fill(x, depth+1)
			v.Set(x)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() && v.Type().Field(i).Tag.Get("json") != "-" {
				g.fill(v.Field(i), depth+1)
			}
		}
	}
}

// alike reports whether a value that arrived in MessagePack is the same as one that arrived in JSON, or was sent. It allows for
// what the documentation of MsgPack says about times, and about numbers, bytes and times in an any; if rough is set, also about a
// float32 that arrives as a float64, and for what omitempty leaves out.
func alike(got, want reflect.Value, rough bool) bool {
	if !got.IsValid() || !want.IsValid() {
		return got.IsValid() == want.IsValid()
	}
	if got.Kind() == reflect.Interface {
		got, want = got.Elem(), want.Elem()
		if got.IsValid() && want.IsValid() && got.Type() != want.Type() || got.IsValid() != want.IsValid() {
			var v any // want is what was sent, perhaps: compare with what JSON makes of it
			var sent any
			if want.IsValid() {
				sent = want.Interface()
			}
			if text, err := json.Marshal(sent); err != nil || json.Unmarshal(text, &v) != nil {
				return true
			}
			want = reflect.ValueOf(v)
		}
		if !got.IsValid() || !want.IsValid() {
			return got.IsValid() == want.IsValid()
		}
		switch {
		case isNumber(got) && isNumber(want):
			a, _ := strconv.ParseFloat(fmt.Sprint(got), 64)
			b, _ := strconv.ParseFloat(fmt.Sprint(want), 64)
			return a == b || a != a && b != b || float32(a) == float32(b)
		case got.Type() == reflect.TypeFor[[]byte]() && want.Kind() == reflect.String:
			return base64.StdEncoding.EncodeToString(got.Bytes()) == want.String()
		case got.Type() == reflect.TypeFor[[]byte]() && want.Type() == reflect.TypeFor[[]any]():
			return got.Len() == want.Len()
		case got.Type() == reflect.TypeFor[time.Time]() && want.Kind() == reflect.String:
			at, err := time.Parse(time.RFC3339Nano, want.String())
			return err == nil && at.Equal(got.Interface().(time.Time))
		case got.Type() == reflect.TypeFor[[]byte]() && want.Kind() == reflect.Map: // binaryOnly has no exported fields
			return want.Len() == 0
		}
	}
	if got.Type() != want.Type() {
		return false
	}
	if got.Type() == reflect.TypeFor[binaryOnly]() && want.IsZero() {
		return true // JSON does not carry it
	}
	if got.Type() == reflect.TypeFor[json.RawMessage]() {
		return want.Len() == 0 || json.Valid(got.Bytes()) // binary data is in base 64, keys in another order
	}
	if got.Type() == reflect.TypeFor[time.Time]() {
		return got.Interface().(time.Time).Equal(want.Interface().(time.Time))
	}
	switch got.Kind() {
	case reflect.String: // JSON replaces each byte that is not UTF-8
		return got.String() == want.String() || string([]rune(got.String())) == want.String()
	case reflect.Float32, reflect.Float64:
		return got.Float() == want.Float() || rough && float32(got.Float()) == float32(want.Float()) || got.Float() != got.Float() && want.Float() != want.Float()
	case reflect.Pointer:
		if rough && isNull(want) {
			return got.IsNil()
		}
		return got.IsNil() == want.IsNil() && (got.IsNil() || alike(got.Elem(), want.Elem(), rough))
	case reflect.Slice, reflect.Array:
		if got.Len() != want.Len() || !rough && got.Kind() == reflect.Slice && got.IsNil() != want.IsNil() {
			return false
		}
		for i := range got.Len() {
			if !alike(got.Index(i), want.Index(i), rough) {
				return false
			}
		}
		return true
	case reflect.Map:
		if got.Len() != want.Len() || !rough && got.IsNil() != want.IsNil() {
			return false
		}
		for m := want.MapRange(); m.Next(); {
			found := false
			for _, key := range got.MapKeys() {
				found = found || alike(key, m.Key(), rough) && alike(got.MapIndex(key), m.Value(), rough)
			}
			if !found {
				return false
			}
		}
		return true
	case reflect.Struct:
		fields := 0
		for i := range got.NumField() {
			if f := got.Type().Field(i); f.IsExported() || f.Anonymous {
				fields++
				if !alike(got.Field(i), want.Field(i), rough) {
					return false
				}
			}
		}
		if fields > 0 {
			return true
		}
	}
	return reflect.DeepEqual(got.Interface(), want.Interface())
}

// isNull reports whether v is nil, or a pointer to nil.
func isNull(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		return v.IsNil() || isNull(v.Elem())
	case reflect.Slice, reflect.Map:
		return v.IsNil()
	}
	return false
}

func isNumber(v reflect.Value) bool { return v.CanInt() || v.CanUint() || v.CanFloat() }
